"""mlx_sora."""
