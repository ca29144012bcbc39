"""Make an mp4 from a prompt with the bundled model: python examples/text_to_video.py"""

from mlx_sora import Pipeline

pipe = Pipeline("shapes")
video = pipe(
    "a red circle moving right on a black background",
    seed=1,
    output="red-circle.mp4",
    overwrite=True,
)
seconds = sum(video.timings.values())
print(f"{video.path}: {video.num_frames} frames, {video.width}x{video.height}, {seconds:.1f} s")
