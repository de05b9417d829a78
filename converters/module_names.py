"""Names of modules in transformers and in mlx-lm, and how the parameters behind them correspond.

With a base at hand they come from its own checkpoint: ``weight_map`` says which array of it each parameter of mlx-lm
is, the tables here what transformers 5 calls that array (they are compared with transformers' own in the tests).
Without a base, a few rules stand in, which hold for most architectures.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from mlx_rsgwm.converters.weight_map import Link, WeightMap

# What transformers 5 renames when it loads a checkpoint: expressions and their replacements, by model type.
BLOCK_SPARSE = ((r"\.block_sparse_moe\.", ".mlp."),)
INPUT_OUTPUT = (
    (r"block_sparse_moe\.input_linear\.weight", "block_sparse_moe.experts.gate_up_proj"),
    (r"block_sparse_moe\.output_linear\.weight", "block_sparse_moe.experts.down_proj"),
    (r"block_sparse_moe\.router\.layer\.weight", "block_sparse_moe.router.weight"),
)
LLAVA = ((r"^language_model\.lm_head", "lm_head"), (r"^language_model\.(?:model\.)?", "model.language_model."))
RENAMED: dict[str, tuple[tuple[str, str], ...]] = {
    "mixtral": BLOCK_SPARSE,
    "minimax": BLOCK_SPARSE,
    "minimax_m2": BLOCK_SPARSE,
    "phimoe": (*BLOCK_SPARSE, (r"\.mlp\.gate\.", ".mlp.router.")),
    "granitemoe": INPUT_OUTPUT,
    "granitemoehybrid": INPUT_OUTPUT,
    "laguna": ((r"\.mlp\.shared_expert\.", ".mlp.shared_experts."),),
    "nemotron_h": ((r"^backbone\.", "model."),),
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "gemma3": LLAVA,
    "mistral3": LLAVA,
    "llava": LLAVA,
    "olmo_hybrid": (
        (r"\.attention_layer_norm\.", ".input_layernorm."),
        (r"\.feedforward_layer_norm\.", ".post_attention_layernorm."),
    ),
}
# What transformers calls the model below the head, where not "model".
PREFIXES = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "gptj", "dbrx", "exaone"), "transformer"),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "backbone"),
    "gpt_neox": "gpt_neox",
}
# Models of text and images of which AutoModelForCausalLM loads the text model alone.
TEXT_ONLY = ("qwen3_5", "qwen3_5_moe")
HEADS = ("lm_head.", "embed_out.", "output.")
TORCH_HEADS = {"internlm2": "output"}  # transformers' name of the head, where not lm_head
CONV1D = (".c_attn", ".c_proj", ".c_fc")  # of GPT-2, whose checkpoints have these layers' weights transposed
# (mlx-lm's prefix, the checkpoint's, the model types; empty: every), for bases that mlx-lm has saved.
ROOTS = (
    ("language_model.model.", "model.language_model.", frozenset[str]()),
    ("language_model.lm_head", "lm_head", frozenset[str]()),
    ("model.", "transformer.", frozenset({"gpt2", "gpt_bigcode"})),
    ("model.h.", "gpt_neox.layers.", frozenset({"gpt_neox"})),
    ("model.", "gpt_neox.", frozenset({"gpt_neox"})),
)
# Model types whose arrays mlx-lm changes, or names otherwise than the rules below say.
NEEDS_BASE = (
    *("falcon_h1", "qwen3_next", "qwen3_5", "qwen3_5_moe", "granitemoe", "granitemoehybrid", "lfm2_moe", "gptj"),
    *("nemotron_h", "olmo_hybrid", "laguna", "gpt_oss", "llama4", "llama4_text", "jamba", "phimoe", "dbrx"),
)
ONE_EXPERT = re.compile(
    r"(?P<block>.+)\.experts\.(?P<expert>\d+)\.(?P<projection>gate_proj|up_proj|down_proj|w1|w2|w3)"
)
MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
SWITCH = re.compile(r"(?P<block>.+)\.(?P<switch>switch_mlp|experts)\.(?P<projection>gate_proj|up_proj|down_proj)")
BLOCK_MLP = re.compile(r"(layers\.\d+)\.mlp(\.|$)")
BLOCK_SPARSE_MOE = re.compile(r"(layers\.\d+)\.block_sparse_moe(\.|$)")
KEEPS_BLOCK_SPARSE = ("mixtral", "phimoe", "minimax", "minimax_m2")  # in mlx-lm, where transformers 5 says mlp
PLAIN_EXPERTS = ("afmoe", "dots1")  # mlx-lm calls the stacked layers experts, not switch_mlp
ROUTER = re.compile(r".+\.(?:mlp|block_sparse_moe|feed_forward)\.(?:gate|router)")
# PEFT 0.21 takes a target of one of these names for the stacked experts of the model types below, whatever the module
# it stands for, so that dense and shared layers of that name are left out; only full parameter names reach them.
REWRITTEN = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}
REWRITTEN_TYPES = {
    **dict.fromkeys(
        (
            *("qwen2_moe", "afmoe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
            *("exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "mellum", "olmoe"),
            *("qwen3_moe", "qwen3_next", "solar_open"),
        ),
        "qwen2_moe",
    ),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), "mixtral"),
}
# PEFT refuses LoRA on layers of these names in Mamba models, whose kernels read the weight past the layer.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MAMBA_LAYERS = ("out_proj", "conv1d")
# Names that transformers' own renaming, which PEFT 0.21 runs over an adapter's arrays, makes into names of nothing.
LOST_BY_PEFT = {"laguna": ".mlp.shared_experts."}


def transformers_parameter(name: str, model_type: str | None, bare: bool = False) -> str:
    """What transformers 5 calls the checkpoint's array ``name``; stacked experts by the parameter they are in.

    ``bare``: the checkpoint is of the model below the head, so that its prefix is left out.
    """
    for pattern, new in RENAMED.get(model_type or "", ()):
        name = re.sub(pattern, new, name)
    if bare and not name.startswith(HEADS):
        name = f"{PREFIXES.get(model_type or '', 'model')}.{name}"
    if model_type in TEXT_ONLY:
        name = name.replace("model.language_model.", "model.", 1)
    if match := ONE_EXPERT.fullmatch(name.removesuffix(".weight")):
        down = MIXTRAL.get(match["projection"], match["projection"]) == "down_proj"
        return f"{match['block']}.experts.{'down_proj' if down else 'gate_up_proj'}"
    return name


def needs_parameter(module: str, model_type: str | None) -> bool:
    """Whether PEFT reaches the weight of transformers' ``module`` only as a parameter, by its full name."""
    leaf = module.rpartition(".")[2]
    rewritten = REWRITTEN.get(REWRITTEN_TYPES.get(model_type or "", ""), ())
    return leaf in rewritten or ROUTER.fullmatch(module) is not None


def mlx_by_rule(module: str, model_type: str | None) -> str:
    """mlx-lm's name for a module of transformers where no base says otherwise; experts are not its business."""
    if model_type in KEEPS_BLOCK_SPARSE:
        module = BLOCK_MLP.sub(r"\1.block_sparse_moe\2", module)
    for mlx_root, saved_root, types in sorted(ROOTS, key=lambda root: -len(root[1])):
        if module.startswith(saved_root) and (not types or model_type in types) and saved_root != "lm_head":
            return mlx_root + module[len(saved_root) :]
    return module


def transformers_by_rule(module: str, model_type: str | None) -> str:
    """transformers' name for a module of mlx-lm where no base says otherwise; experts are not its business."""
    if model_type is None or model_type in KEEPS_BLOCK_SPARSE:
        module = BLOCK_SPARSE_MOE.sub(r"\1.mlp\2", module)
    for mlx_root, saved_root, types in sorted(ROOTS, key=lambda root: -len(root[0])):
        if module.startswith(mlx_root) and (not types or model_type in types):
            return saved_root + module[len(mlx_root) :]
    return module


@dataclass(frozen=True)
class Names:
    """Modules of one base in both libraries; without ``weights`` by rule alone.

    ``weights``: the base's map, by mlx-lm's parameters. ``bare``: its checkpoint leaves the model's prefix out.
    """

    model_type: str | None = None
    weights: WeightMap | None = None
    bare: bool = False

    @property
    def head(self) -> str:
        """transformers' output head, which a tied base has no array of."""
        return TORCH_HEADS.get(self.model_type or "", "lm_head")

    @property
    def by_rule(self) -> Names:
        """The same model's names by rule alone, without its checkpoint."""
        return Names(self.model_type)

    def link(self, parameter: str) -> Link | None:
        """How mlx-lm's ``parameter`` comes from the checkpoint; by rule it is the checkpoint's own."""
        return None if self.weights is None else self.weights.link(parameter)

    @cached_property
    def _is_wrapped(self) -> bool:
        """Whether mlx-lm's model is one of text and images, with the language model inside."""
        return self.weights is not None and any(
            name.startswith("language_model.model.") for name in self.weights.names()
        )

    @cached_property
    def _transformers(self) -> dict[str, str]:
        """transformers' parameter by mlx-lm's, where it comes from one array of the checkpoint; experts left out."""
        assert self.weights is not None
        renamed = {}
        for name in self.weights.names():
            link = None if SWITCH.fullmatch(name.removesuffix(".weight")) else self.weights.link(name)
            sources = dict.fromkeys(link.sources) if link is not None else {}
            if len(sources) == 1:
                renamed[name] = transformers_parameter(next(iter(sources)), self.model_type, self.bare)
        return renamed

    @cached_property
    def _mlx(self) -> dict[str, list[str]]:
        """mlx-lm's parameters by transformers', by the checkpoint's, and by what other classes of the model say."""
        assert self.weights is not None
        by_alias: dict[str, list[str]] = {}
        for name, saved_name in self._transformers.items():
            link = self.weights.link(name)
            assert link is not None
            for alias in dict.fromkeys((saved_name, *dict.fromkeys(link.sources), *_aliases(saved_name))):
                by_alias.setdefault(alias, []).append(name)
        return by_alias

    def mlx_parameters(self, parameter: str) -> list[str]:
        """The parameters of mlx-lm that hold transformers' ``parameter``: several where mlx-lm splits it."""
        if self.weights is not None and parameter in self._mlx:
            return self._mlx[parameter]
        module, _, leaf = parameter.rpartition(".")
        if module == "lm_head" and self._is_wrapped:  # of a base that ties it, so that no array says where it is
            return [f"language_model.{parameter}"]
        return [f"{mlx_by_rule(module, self.model_type)}.{leaf}"]

    def mlx_modules(self, module: str) -> list[str]:
        """The modules of mlx-lm that hold the weight of transformers' ``module``."""
        return [name.removesuffix(".weight") for name in self.mlx_parameters(f"{module}.weight")]

    def mlx_module(self, module: str) -> str:
        """The first module of mlx-lm that holds the weight of transformers' ``module``."""
        return self.mlx_modules(module)[0]

    def transformers_parameter(self, parameter: str) -> str:
        """transformers' name for mlx-lm's ``parameter``."""
        if self.weights is not None and parameter in self._transformers:
            return self._transformers[parameter]
        module, _, leaf = parameter.rpartition(".")
        return f"{transformers_by_rule(module, self.model_type)}.{leaf}"

    def transformers_module(self, module: str) -> str:
        """transformers' module for mlx-lm's ``module``."""
        return self.transformers_parameter(f"{module}.weight").removesuffix(".weight")

    def switch_layers(self, block: str) -> str:
        """mlx-lm's stacked layers of experts in transformers' ``block``, up to the projection's name."""
        for name in self._switches.get(block, ()):
            return name
        mlx_block = mlx_by_rule(block, self.model_type)
        return f"{mlx_block}.{'experts' if self.model_type in PLAIN_EXPERTS else 'switch_mlp'}"

    def experts_block(self, switch: str) -> str:
        """transformers' block for mlx-lm's stacked layers ``switch``: the reverse of :meth:`switch_layers`."""
        for block, names in self._switches.items():
            if switch in names and not self._is_alias(block):
                return block
        return transformers_by_rule(switch.rpartition(".")[0], self.model_type)

    def _is_alias(self, block: str) -> bool:
        return block not in self._blocks.values()

    @cached_property
    def _blocks(self) -> dict[str, str]:
        """transformers' block by mlx-lm's stacked layers."""
        if self.weights is None:
            return {}
        blocks: dict[str, str] = {}
        for name in self.weights.names():
            match = SWITCH.fullmatch(name.removesuffix(".weight"))
            switch = f"{match['block']}.{match['switch']}" if match else None
            if match is None or switch in blocks:
                continue
            link = self.weights.link(name)
            saved_name = transformers_parameter(link.source, self.model_type, self.bare) if link is not None else ""
            if saved_name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
                blocks[str(switch)] = saved_name.rpartition(".experts.")[0]
        return blocks

    @cached_property
    def _switches(self) -> dict[str, list[str]]:
        """mlx-lm's stacked layers by every name that transformers, old or new, has for their block."""
        by_source: dict[str, list[str]] = {}
        for switch, block in self._blocks.items():
            old = BLOCK_MLP.sub(r"\1.block_sparse_moe\2", block)
            for name in dict.fromkeys((block, old, *_aliases(block))):
                by_source.setdefault(name, []).append(switch)
        return by_source


def _aliases(name: str) -> Iterable[str]:
    """The same in the text model alone, and in the whole model of text and images."""
    if name.startswith("model.language_model."):
        return (name.replace("model.language_model.", "model.", 1),)
    if name.startswith("model."):
        return (name.replace("model.", "model.language_model.", 1),)
    return ()


def checkpoint_shapes(parameters: Mapping[str, tuple[int, ...]], model_type: str) -> dict[str, tuple[int, ...]]:
    """The checkpoint that mlx-lm's parameters may have come from, for a base that mlx-lm has saved itself.

    Names of its own are undone, convolutions have torch's order of axes, experts are apart.
    """
    shapes_there: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters.items():
        module, _, leaf = name.rpartition(".")
        keeps = model_type in KEEPS_BLOCK_SPARSE  # the checkpoint, too, has the older name
        saved_name = name if keeps else f"{transformers_by_rule(module, model_type)}.{leaf}"
        match = SWITCH.fullmatch(module)
        if match and len(shape) == 3:
            block, projection = saved_name.rpartition(f".{match['switch']}.")[0], match["projection"]
            if keeps:
                projection = next(old for old, merged_name in MIXTRAL.items() if merged_name == projection)
            for expert in range(shape[0]):
                shapes_there[f"{block}.experts.{expert}.{projection}.{leaf}"] = shape[1:]
        elif model_type == "gpt2":  # mlx-lm reads it without the prefix of the model below the head
            conv1d = len(shape) == 2 and module.endswith(CONV1D)
            shapes_there[saved_name.removeprefix("transformer.")] = shape[::-1] if conv1d else shape
        elif len(shape) == 3 and module.endswith(("conv1d", "conv")) and shape[2] == 1:
            shapes_there[saved_name] = (shape[0], shape[2], shape[1])
        else:
            shapes_there[saved_name] = shape
    return shapes_there
