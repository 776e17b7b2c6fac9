"""The slowest path that parameters may take, and which entries are not precise."""

from __future__ import annotations

from fnmatch import fnmatchcase

SINGLE_PRECISION = (
    "llama_eager",
    "llama_sdpa",
    "vit_eager",
    "mixtral",
    "qwen2_moe",
    "bloom",
    "switch_transformer",
    "peft_fourier",
)
"""Entries that compute a part in single precision, so that they agree up to its rounding only."""

COMPLEX = (
    "complex_filter",
    "complex_filter_of_channels",
    "complex_filter_in_a_plane",
    "complex_filter_between_real_layers",
    "complex_linear",
    "complex_linear_on_sequences",
    "complex_mlp",
    "complex_of_real_inputs",
    "complex_scale_and_shift",
    "complex_squared_length",
    "complex_conjugate",
    "complex_by_parts",
    "complex_product_of_three",
    "complex_table",
)
"""Entries with complex parameters, whose information is a mean of absolute squares."""

PATHS: dict[str, dict[str, str]] = {
    "linear_of_one_observation_each": {"*": "generic"},
    "addmm_with_factors": {"*": "generic"},
    "matmul_of_heads": {"*": "generic"},
    "einsum_of_three": {"*": "generic"},
    "embedding_bag_max": {"*": "generic"},
    "embedding_bag_with_weights": {"*": "generic"},
    "embedding_bag_with_offsets": {"*": "generic"},
    "sum_in_place": {"*.w": "generic"},
    "sum_with_a_factor": {"*": "generic"},
    "bilinear": {"*": "generic"},
    "branches": {"*.idle": "unused", "*.long": "unused"},
    "experts_in_one_product": {"*.w": "generic"},
    "traced": {"*": "generic"},
    "scripted": {"*": "generic"},
    "custom_function": {"*.hidden": "generic"},
    "two_names*": {"*": "generic"},
    "three_names": {"*": "generic"},
    "two_lists_of_the_same_blocks": {"*": "generic"},
    "two_names_of_a_recurrent_layer": {"*": "loop"},
    "rows_*": {"*": "loop"},
    "experts_of_whom_some_are_idle": {"*.router.*": "generic"},
    "hidden_*": {"*": "generic"},
    "hidden_of_some_rows": {"*": "loop"},
    "hidden_if_some*": {"*": "loop"},
    "hidden_if_the_largest*": {"*": "loop"},
    "hidden_if_any*": {"*": "loop"},
    "hidden_on_another_path": {"*": "loop"},
    "hidden_and_seen*": {"*": "loop"},
    "hidden_in_a_script*": {"*": "loop"},
    "used_in_some_batches*": {"*": "loop"},
    "order_*_of_what_no_rule_knows": {"*": "generic"},
    "order_*_of_positions_first": {"*": "generic"},
    "adapter_that*": {"*.down": "unused", "*.up": "unused"},
    "stores_*": {"*": "generic"},
    "edits_for_what*": {"*": "generic"},
    "complex_*": {"*": "generic"},
    "made_complex_*": {"*": "generic"},
    "hidden_small*": {"*": "generic"},
    "factor_in_*": {"*": "generic"},
    "output_in_*": {"*low": "generic"},
    "blank_at_first_without_a_rule": {"*": "generic"},
    "unused_parameter": {"*idle": "unused"},
    "unused_layer": {"*idle*": "unused"},
    "unused_convolution": {"*idle*": "unused", "*norm*": "unused"},
    "unused_recurrent_layer": {"*idle*": "unused"},
    "zero_gradient_detached": {"*.v": "unused"},
    "weights_mixed_*": {"*": "generic"},
    "weights_called_in_vmap": {"*": "generic"},
    "gradient_inside": {"*": "loop", "*.energy.2.bias": "unused"},
    "gradient_by_*": {"*": "generic", "*.energy.2.bias": "unused"},
    "directional_derivative_inside": {"*": "generic"},
    "adapts_to_each_observation": {"*": "generic"},
    "nested_tensors": {"*": "loop"},
    "exported*": {"*": "generic"},
    "traced_*": {"*": "generic"},
    "scripted_*": {"*": "generic"},
    "checkpoint_without_a_rule": {"*": "loop"},
    "checkpoint_in_segments": {"*.b": "unused"},
    "checkpoint_twice": {"*.b": "unused"},
    "peft_oft": {"*": "generic"},
    "peft_dora_on_gpt2": {"*": "generic"},
    "converts_*": {"*": "loop"},
}
"""The slowest path that parameters may take where it is not by a rule.

Entries and parameters are given by patterns of their names.
"""

FASTEST_FIRST = ("rule", "generic", "loop")


def slower_than_expected(name: str, paths: dict[str, str]) -> dict[str, str]:
    """Return the parameters of an entry that took a slower path than they should."""
    expected = dict.fromkeys(paths, "rule")
    entries = [slowest for entry, slowest in PATHS.items() if fnmatchcase(name, entry)]
    for pattern, path in (pair for slowest in entries for pair in slowest.items()):
        matching = [parameter for parameter in paths if fnmatchcase(parameter, pattern)]
        assert matching, f"{name} has no parameter like {pattern}"
        expected |= dict.fromkeys(matching, path)
    return {
        parameter: path
        for parameter, path in paths.items()
        if path != expected[parameter] and not _faster(path, expected[parameter])
    }


def _faster(path: str, other: str) -> bool:
    if "unused" in (path, other):
        return False
    return FASTEST_FIRST.index(path) < FASTEST_FIRST.index(other)
