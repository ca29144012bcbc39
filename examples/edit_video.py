"""Another colour for what a video shows, all else as it was: python examples/edit_video.py"""

from mlx_sora import Pipeline

pipe = Pipeline.from_pretrained("shapes")
what = "circle moving right on a black background"
source = pipe(f"a red {what}", seed=1, output="red.mp4", overwrite=True)
assert source.path is not None
video = pipe.edit(
    source.path,
    source_prompt=f"a red {what}",
    prompt=f"a blue {what}",
    output="blue.mp4",
    overwrite=True,
)
print(f"{video.path}: {video.metadata['edit']}")
