"""Make a video of three clips with a prompt for each scene: python examples/long_video.py"""

from mlx_sora import Pipeline

pipe = Pipeline("shapes")
scenes = (
    "|0|a blue square staying still on a gray background"
    "|2|a blue square growing on a gray background"
)
video = pipe(scenes, loop=3, num_frames=34, seed=2, steps=10, output="long.mp4", overwrite=True)
print(f"{video.path}: {video.num_frames} frames")
