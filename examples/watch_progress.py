"""Print the events of a run and save its previews: python examples/watch_progress.py"""

from PIL import Image

from mlx_sora import Pipeline
from mlx_sora.runtime.events import Finished, PreviewReady, StageFinished, StepFinished

pipe = Pipeline("shapes")
prompt = "a green triangle growing on a navy background"
for event in pipe.stream(prompt, seed=5, steps=20, preview_every=5):
    if isinstance(event, StepFinished):
        print(f"step {event.step + 1} of {event.total}, t = {event.t:.0f}: {event.seconds:.2f} s")
    elif isinstance(event, PreviewReady):
        Image.fromarray(event.frames[-1]).save(f"preview-{event.step + 1:02d}.png")
    elif isinstance(event, StageFinished):
        print(f"{event.stage}: {event.seconds:.1f} s, {event.peak_memory / 1e6:.0f} MB")
    elif isinstance(event, Finished):
        print(event.video.save("green-triangle.gif", overwrite=True))
