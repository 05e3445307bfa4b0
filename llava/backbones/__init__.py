"""The families of base models, by the model_type of a folder's config.json, and how a folder is opened and loaded.

A family is one file here and one line in `FAMILIES` (docs/extending.md).
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging

from llava.backbone import AS_IS, Backbone, BaseOptions
from llava.backbones.internvl import InternVL
from llava.backbones.llava15 import Llava15
from llava.backbones.qwen_vl import Qwen3VL, Qwen25VL
from llava.backbones.text import T5, Qwen2, Qwen3
from llava.files import check_file, make_config, read_object, weight_files

FAMILIES: dict[str, type[Backbone]] = {
    "llava": Llava15,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "internvl": InternVL,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "t5": T5,
}
QUANTIZATIONS = ("none", "8bit", "nf4", "nf4-double")
NF4_BLOCK = 64  # weights that share a scale


def family_of(path: str | Path) -> type[Backbone]:
    """Return the family of a base model's folder. Raises FileNotFoundError or ValueError naming the folder or file if
    it is none that is known."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no config.json: give the folder of a base model; checkpoints/README.md says how to get one"
        )
    content = read_object(file)
    if "mm_projector_type" in content:
        raise ValueError(
            f"{path} has the original LLaVA layout; convert it with `python -m llava.checkpoint assemble --llm {path}`"
        )
    kind, known = content.get("model_type"), ", ".join(sorted(FAMILIES))
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{file}: model_type is {kind!r}; take a base of one of the families here, of {known}")
    return FAMILIES[kind].variant(Path(path))


def open_backbone(path: str | Path, options: BaseOptions = AS_IS) -> Backbone:
    """Return the backbone of a base model's folder, without its weights. Raises as `family_of`,
    `Backbone.read_processor` and `Backbone` do."""
    family = family_of(path)
    config = _config_of(family, Path(path))
    return family(config, family.read_processor(Path(path), config), options)


def blank_model(path: str | Path, dtype: torch.dtype, options: BaseOptions = AS_IS) -> tuple[PreTrainedModel, Backbone]:
    """Return model and backbone of a folder's config.json alone, on the meta device: shapes without memory.

    The backbone has no processor. Raises as `family_of` and `Backbone` do.
    """
    family = family_of(path)
    config = _config_of(family, Path(path))
    with torch.device("meta"):
        return family.model_class(config).to(dtype), family(config, None, options)


def load_base(
    path: str | Path,
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    attn_implementation: str = "sdpa",
    quantization: str = "none",
    device: torch.device | str = "cpu",
    options: BaseOptions = AS_IS,
) -> tuple[PreTrainedModel, Backbone]:
    """Return model and backbone of a `save_pretrained` folder.

    `quantization` (QLoRA, arXiv 2305.14314): the weights of the language model's blocks in `8bit`, or in 4 bits as
    `nf4`, whose scales `nf4-double` quantises once more; the rest keeps `dtype`, in which they are multiplied.
    `dtype` "auto" is what config.json says.
    The weights go tensor by tensor from the file to `device`, so the host never holds a copy of a model for a GPU. On
    `meta` nothing is read but the files' headers: names and shapes are checked. Where transformers is told of ZeRO 3
    (llaca/engines/) every rank keeps 1/N of each tensor.
    Raises FileNotFoundError or ValueError naming the folder if it is not such a folder or does not fit together.
    """
    path, family = Path(path), family_of(path)
    if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
        raise FileNotFoundError(f"{path} holds no weights; checkpoints/README.md says how to make them")
    config = _config_of(family, path)
    for file in weight_files(path):
        check_file(file)
    if is_deepspeed_zero3_enabled():
        family.check_sharding(path)
    settings = {"dtype": dtype, "attn_implementation": attn_implementation}
    if quantization != "none":
        settings["quantization_config"] = _quantization(path, quantization, dtype, family, config)
    # Quantized weights cannot be moved later. On a CPU the pages of the file are the weights, and ranks share them.
    if quantization != "none" or (torch.device(device).type != "cpu" and not is_deepspeed_zero3_enabled()):
        settings["device_map"] = {"": device}
    model = load_weights(family, str(path), path, **settings).to(device)
    return model, family(model.config, family.read_processor(path, model.config), options)


def load_weights(family: type[Backbone], name: str, path: Path | None, **settings) -> PreTrainedModel:
    """Call `from_pretrained` without its progress bar. Raises ValueError, naming `name`, unless every weight fits."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, report = family.model_class.from_pretrained(path, output_loading_info=True, **settings)
    finally:
        if bars:
            logging.enable_progress_bar()
    faults = {kind: sorted(map(str, names)) for kind, names in report.items() if names}
    if faults:
        raise ValueError(f"the weights of {name} and its configuration do not fit: {faults}")
    return model


def _config_of(family: type[Backbone], path: Path):
    file = path / "config.json"
    return make_config(family.config_class, read_object(file), file)


def _quantization(path: Path, kind: str, dtype: torch.dtype, family: type[Backbone], config):
    from transformers import BitsAndBytesConfig

    if kind not in QUANTIZATIONS:
        raise ValueError(f"quantization is {kind!r}; it must be one of {QUANTIZATIONS}")
    if not family.quantizable:
        raise ValueError(f"{path}: quantization is {kind}, and a base of this family keeps its precision; take none")
    kept = list(family.unquantized)
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    text = config.get_text_config()
    widths = [text.hidden_size, text.intermediate_size]
    if any(width % NF4_BLOCK for width in widths):
        raise ValueError(f"{path}: nf4 takes widths in multiples of {NF4_BLOCK}, this model has {widths}; take 8bit")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=kind == "nf4-double",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )
