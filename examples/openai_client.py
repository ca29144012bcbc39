"""Make videos through a running server: pip install openai, then python examples/openai_client.py

The server is `python -m mlx_sora serve`.
"""

import os
import warnings

from openai import OpenAI, omit

# The client warns at each call that OpenAI's own service for videos ends.
warnings.filterwarnings("ignore", category=DeprecationWarning)

url = os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8420/v1")
client = OpenAI(base_url=url, api_key=os.environ.get("MLX_SORA_TOKEN", "none"))

# Any option of `generate` goes along in extra_body.
circle = client.videos.create_and_poll(
    prompt="a red circle moving right on a black background",
    extra_body={"steps": 10, "seed": 1},
)
edited = client.videos.remix(
    circle.id,
    prompt="a blue circle moving right on a black background",
    extra_body={"steps": 8},
)
longer = client.videos.extend(
    prompt="a red circle moving left on a black background",
    seconds="1",
    video=omit,  # the client takes only files there
    extra_body={"video": {"id": circle.id}, "steps": 10},
)

for name, video in (("circle", circle), ("edited", edited), ("longer", longer)):
    video = client.videos.poll(video.id)
    if video.status != "completed":
        raise SystemExit(f"{name}: {video.error}")
    client.videos.download_content(video.id).write_to_file(f"{name}.mp4")
    print(f"{name}.mp4: {video.seconds} s, {video.size}")
