"""Sizes of a pack that is built in seconds."""

from edge_align_export.linear import LinearConfig

SMALL = LinearConfig(
    k=12,
    prompts=8,
    max_tokens=24,
    metric_answers=2,
    metric_tokens=8,
    curve_points=4,
    loop_latents=2,
    loop_prompts=2,
    base_draws=1,
    loop_tokens=8,
)
