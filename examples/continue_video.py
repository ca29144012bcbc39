"""Continue a video, and make what comes before it: python examples/continue_video.py"""

from mlx_sora import Pipeline

pipe = Pipeline("shapes")
prompt = "a green triangle growing on a navy background"
pipe(prompt, seed=3, steps=10, output="clip.mp4", overwrite=True)

for side, name in (("before", "continued.mp4"), ("after", "preceding.mp4")):
    video = pipe(
        prompt,
        videos=[("clip.mp4", side)],
        num_frames=34,
        seed=4,
        steps=10,
        output=name,
        overwrite=True,
    )
    print(f"{video.path}: {video.num_frames} frames, 17 of them from clip.mp4")
