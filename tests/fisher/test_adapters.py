"""Right on the adapters of the peft library, and on what transformers computes from parameters."""

from functools import cache

import pytest
import torch
from torch import nn

from tests.scenarios import CLASSES, N, Scenario
from tests.zoo import error, measure, read, stir, truth

WORDS = 7
TINY = {
    "vocab_size": WORDS,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "num_labels": CLASSES,
    "pad_token_id": 0,
}
OFT = {"oft_block_size": 4, "r": 0}
ADAPTERS = {
    "lora": ("LoraConfig", {"r": 2}),
    "dora": ("LoraConfig", {"r": 2, "use_dora": True}),
    "loha": ("LoHaConfig", {"r": 2}),
    "lokr": ("LoKrConfig", {"r": 2}),
    "lokr_of_low_rank": ("LoKrConfig", {"r": 1, "decompose_both": True}),
    "oft": ("OFTConfig", OFT),
    "oft_solved": ("OFTConfig", OFT | {"use_cayley_neumann": False}),
    "oft_bounded": ("OFTConfig", OFT | {"coft": True, "eps": 1e-2}),
    "oft_shared": ("OFTConfig", OFT | {"block_share": True}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
    "vera": ("VeraConfig", {"r": 4}),
    "ia3": ("IA3Config", {"feedforward_modules": ["2"]}),
    "hra": ("HRAConfig", {"r": 2}),
    "vblora": ("VBLoRAConfig", {"r": 2, "num_vectors": 4, "vector_length": 4, "topk": 2}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20}),
    "shira": ("ShiraConfig", {"r": 2}),
    "randlora": ("RandLoraConfig", {"r": 2}),
    "c3a": ("C3AConfig", {"block_size": 4}),
}
"""The configuration of each adapter, beside the layers that get one."""

SINGLE = ("fourierft", "c3a", "t5", "mixtral", "qwen2")
"""Models that compute a part in single precision whatever they are given."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]


def adapted(name):
    peft = pytest.importorskip("peft")
    kind, options = ADAPTERS[name]
    if not hasattr(peft, kind):
        pytest.skip(f"this peft has no {kind}")
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    config = getattr(peft, kind)(target_modules=["0", "2"], **options)
    return read(stir(peft.get_peft_model(base, config)), torch.randn(N, 3, 8))


def transformer(kind, options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**TINY | options)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config)


def on_text(model, ends=False):
    """Texts of different length, with their padding on the right."""
    length = torch.randint(2, 6, (N, 1))
    length[0] = 5
    at = torch.arange(5)
    words = torch.randint(2, WORDS, (N, 5)).masked_fill(at >= length, 0)
    if ends:
        words[at == length - 1] = 1
    inputs = {"input_ids": words, "attention_mask": (at < length).long()}
    return Scenario(stir(model), inputs, "categorical", torch.randint(0, CLASSES, (N,)))


def prompted(kind, **options):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="SEQ_CLS", num_virtual_tokens=3, **options)
    return on_text(peft.get_peft_model(transformer("Bert", {}), config))


def t5(attention):
    own = {"d_model": 4, "d_kv": 2, "d_ff": 6, "num_layers": 1, "num_heads": 2, "eos_token_id": 1}
    start = {"decoder_start_token_id": 0, "relative_attention_num_buckets": 8}
    return on_text(transformer("T5", own | start | {"attn_implementation": attention}), ends=True)


def experts(kind, implementation):
    own = {"num_local_experts": 3, "num_experts": 3, "num_experts_per_tok": 2}
    size = {"moe_intermediate_size": 4, "shared_expert_intermediate_size": 4}
    heads = {"num_key_value_heads": 1, "experts_implementation": implementation}
    return on_text(transformer(kind, own | size | heads))


CASES = {name: lambda name=name: adapted(name) for name in ADAPTERS} | {
    "prompt_tuning": lambda: prompted("PromptTuningConfig"),
    "p_tuning": lambda: prompted("PromptEncoderConfig", encoder_hidden_size=4),
    "t5_eager": lambda: t5("eager"),
    "t5_sdpa": lambda: t5("sdpa"),
    "mixtral_eager": lambda: experts("Mixtral", "eager"),
    "mixtral_batched_mm": lambda: experts("Mixtral", "batched_mm"),
    "qwen2_moe_eager": lambda: experts("Qwen2Moe", "eager"),
    "qwen2_moe_batched_mm": lambda: experts("Qwen2Moe", "batched_mm"),
    "mixtral_grouped_mm": lambda: experts("Mixtral", "grouped_mm"),
}
NO_DOUBLE = {"mixtral_grouped_mm": torch.float32}
"""Models whose kernels know no double precision."""


def make(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = CASES[name]()
    dtype = NO_DOUBLE.get(name, torch.float64)
    x = case.x.to(dtype) if isinstance(case.x, torch.Tensor) else case.x
    return case._replace(model=case.model.to(dtype), x=x)


@cache
def expected(name):
    return truth(make(name)).diagonal("empirical")


@pytest.mark.parametrize("size", [1, 4, 7, N])
@pytest.mark.parametrize("name", CASES)
def test_the_diagonal_is_that_of_one_observation_at_a_time(name, size):
    found = measure(make(name), size, kind="empirical")
    tolerance = 1e-3 if name in NO_DOUBLE else 1e-5 if name.startswith(SINGLE) else 1e-10
    assert error(found.diagonal(), expected(name)) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_what_is_computed_from_parameters_alone_needs_no_slow_path(name):
    paths = measure(make(name), kind="empirical").paths
    slow = {n: path for n, path in paths.items() if path not in ("rule", "unused")}
    assert all(name == "c3a" and "c3a_kernel" in n for n in slow), slow
