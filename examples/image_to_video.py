"""Animate an image, and animate between two images: python examples/image_to_video.py"""

from PIL import Image, ImageDraw

from mlx_sora import Pipeline

first = Image.new("RGB", (64, 64), "black")
ImageDraw.Draw(first).ellipse((6, 20, 30, 44), fill=(220, 40, 40))

pipe = Pipeline("shapes")
prompt = "a red circle moving right on a black background"
video = pipe(prompt, images=first, seed=1, output="animated.mp4", overwrite=True)
print(f"{video.path}: {video.num_frames} frames from {video.metadata['settings']['media']}")

last = first.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
between = pipe(
    prompt, images=[first, (last, "last")], seed=1, steps=10, output="between.mp4", overwrite=True
)
print(between.path)
