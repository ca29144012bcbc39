"""Make several images; all prompts are encoded first: python examples/many_videos.py"""

from mlx_sora import GenerationRequest, Pipeline
from mlx_sora.runtime.events import Finished, RequestFailed, RequestStarted

requests = [
    GenerationRequest(
        prompt=f"a {colour} circle on a white background",
        negative_prompt="a square",
        num_frames=1,
        seed=seed,
        output=f"{colour}.png",
        overwrite=True,
    )
    for seed, colour in enumerate(("red", "green", "blue"))
]
pipe = Pipeline("shapes")
for event in pipe.stream_all(requests):
    if isinstance(event, RequestStarted):
        print(f"{event.index + 1} of {event.total}: {event.prompt}")
    elif isinstance(event, RequestFailed):
        print(f"failed: {event.error}")
    elif isinstance(event, Finished):
        print(event.video.path)
