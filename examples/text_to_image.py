"""Make an image, which is a video of one frame: python examples/text_to_image.py"""

from mlx_sora import Pipeline

pipe = Pipeline("shapes")
image = pipe("a blue square staying still on a white background", seed=3, num_frames=1)
print(image.save("blue-square.png", overwrite=True))
