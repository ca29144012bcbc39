"""Change the colour of a circle in a video: python examples/edit_video.py"""

from mlx_sora import Pipeline

pipe = Pipeline("shapes")
scene = "circle moving right on a black background"
source = pipe(f"a red {scene}", seed=1, output="red.mp4", overwrite=True)
video = pipe.edit(
    source,
    source_prompt=f"a red {scene}",
    prompt=f"a blue {scene}",
    output="blue.mp4",
    overwrite=True,
)
print(f"{video.path}: {video.metadata['edit']}")
