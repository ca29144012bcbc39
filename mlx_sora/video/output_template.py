"""Templates of the names of outputs, such as {prompt_slug}-{seed}, and files of their {date}s."""

from __future__ import annotations

import datetime
import glob
import re
import string
from contextlib import suppress
from pathlib import Path

from mlx_sora.errors import UsageError

TEMPLATE_NAMES = ("seed", "index", "prompt_slug", "model", "date")

#: Default of the command line; the suffix depends on the number of frames.
DEFAULT_OUTPUT = "{prompt_slug}-{seed}"

#: Place of {date} in a path that stands for all days: a character that no date or slug has.
ANY_DATE = "\ue000"

#: Dates, such as 2026-01-31, as a pattern for glob and as an expression.
_DATE_PATTERN = "-".join("[0-9]" * count for count in (4, 2, 2))
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")

#: Format of a template's field, such as {index:03d}; larger widths would make long names.
_SPEC = re.compile(r"\d{0,2}d?")


def slug(prompt: str, limit: int = 48) -> str:
    """Return a prompt's words for a file name: joined by hyphens, at most `limit` characters."""
    words = re.findall(r"\w+", prompt.lower())
    return "-".join(words)[:limit].strip("-_") or "video"


def fill_template(template: str, *, prompt: str, seed: int, index: int = 0, model: str = "") -> str:
    """Fill the TEMPLATE_NAMES into `template` ({index:03d} works too). {date} is today's.

    Raises UsageError for any other name.
    """
    try:
        for _, name, spec, conversion in string.Formatter().parse(template):
            if name is None:
                continue
            if name not in TEMPLATE_NAMES or conversion or not _SPEC.fullmatch(spec or ""):
                raise ValueError
        today = datetime.date.today().isoformat()
        values = {"prompt_slug": slug(prompt), "model": slug(model), "date": today}
        return template.format(seed=seed, index=index, **values)
    except (ValueError, LookupError, AttributeError):
        known = ", ".join(f"{{{name}}}" for name in TEMPLATE_NAMES)
        raise UsageError(
            f"Cannot fill in the output {template!r}.",
            f"Use {known}; write {{{{ and }}}} for braces.",
        ) from None


def escape_template(name: str) -> str:
    """Return the template that `fill_template` turns into `name`."""
    return name.replace("{", "{{").replace("}", "}}")


def has_date(template: str) -> bool:
    """Return True if a template has a field {date}."""
    with suppress(ValueError):
        return any(name == "date" for _, name, *_ in string.Formatter().parse(template))
    return False


def with_date(template: str, date: str) -> str:
    """Return the template with `date` in place of {date}."""
    words = []
    for text, name, spec, _ in string.Formatter().parse(template):
        field = "" if name is None else f"{{{name}:{spec}}}" if spec else f"{{{name}}}"
        words += [escape_template(text), date if name == "date" else field]
    return "".join(words)


def files_of_any_date(path: Path, name: str | None = None) -> list[Path]:
    """Return the files that `path` names, whose dates are ANY_DATE; the last day comes first.

    name: a pattern for glob in place of the last part of `path`.
    """
    parts = str(path if name is None else path.parent).split(ANY_DATE)
    pattern = _DATE_PATTERN.join(map(glob.escape, parts)) + ("" if name is None else f"/{name}")
    return sorted(map(Path, glob.glob(pattern)), reverse=True)


def dates_of(path: Path) -> list[str]:
    """Return the dates in a path, each once."""
    return list(dict.fromkeys(_DATE.findall(str(path))))
