"""Animate an image, and animate between two images: python examples/image_to_video.py"""

from PIL import Image, ImageDraw

from mlx_sora import Pipeline

first = Image.new("RGB", (64, 64), "black")
ImageDraw.Draw(first).ellipse((6, 20, 30, 44), fill=(220, 40, 40))
first.save("first.png")

pipe = Pipeline.from_pretrained("shapes")
prompt = "a red circle moving right on a black background"
video = pipe(prompt, images="first.png", seed=1, output="animated.mp4", overwrite=True)
print(f"{video.path}: {video.num_frames} frames from {video.metadata['settings']['media']}")

first.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("last.png")
images = ["first.png", ("last.png", "last")]
between = pipe(prompt, images=images, seed=1, steps=10, output="between.mp4", overwrite=True)
print(between.path)
