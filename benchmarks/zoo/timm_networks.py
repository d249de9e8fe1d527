"""One network of each of timm's modules: usually the smallest of those that are trained with, and a few more.

Holds: their names, and how one is built. Elsewhere: any measurement.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch

from benchmarks.zoo.measure import Building, Built

MISSING = "the networks of timm need timm and torchvision: pip install 'torch-apoptosis[zoo]'"

# module -> network; of a module that is not listed (a newer timm), the first in alphabetical order
CHOSEN = {
    "beit": "beit_base_patch16_224", "byoanet": "botnet26t_256", "byobnet": "gcresnext26ts", "cait": "cait_xxs24_224",
    "coat": "coat_lite_tiny", "convit": "convit_tiny", "convmixer": "convmixer_768_32", "convnext": "convnext_atto",
    "cpubone": "cpubone_b0_bfrobust", "crossvit": "crossvit_tiny_240", "csatv2": "csatv2", "cspnet": "cspresnet50",
    "cspnext": "cspnext_tiny", "davit": "davit_tiny", "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224", "densenet": "densenet121", "dla": "dla34", "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small", "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0", "efficientnet": "efficientnet_b0", "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0", "efficientvit_msra": "efficientvit_m0", "eva": "eva02_tiny_patch14_224",
    "fasternet": "fasternet_t0", "fastvit": "fastvit_t8", "focalnet": "focalnet_tiny_srf", "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m", "ghostnet": "ghostnet_100", "hardcorenas": "hardcorenas_a",
    "hgnet": "hgnetv2_b0", "hiera": "hiera_tiny_224", "hieradet_sam2": "hieradet_small", "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t", "inception_next": "inception_next_atto", "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3", "inception_v4": "inception_v4", "lcnetv2": "lcnetv2_small", "levit": "levit_128s",
    "lowformer": "lowformer_b0", "mambaout": "mambaout_femto", "maxxvit": "coatnet_pico_rw_224",
    "metaformer": "poolformer_s12", "mlp_mixer": "mixer_s32_224", "mobilenetv3": "mobilenetv3_small_100",
    "mobilenetv5": "mobilenetv5_base", "mobilevit": "mobilevit_xxs", "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_gap", "nasnet": "nasnetalarge", "nest": "nest_tiny",
    "nextvit": "nextvit_small", "nfnet": "nf_resnet50", "pit": "pit_ti_224", "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0", "qwen3_vit": "qwen3_vit_306m", "rdnet": "rdnet_tiny", "regnet": "regnety_002",
    "repghost": "repghostnet_050", "repvit": "repvit_m0_9", "res2net": "res2net50_26w_4s", "resnest": "resnest14d",
    "resnet": "resnet18", "resnetv2": "resnetv2_50", "rexnet": "rexnet_100", "selecsls": "selecsls42",
    "senet": "legacy_seresnet18", "sequencer": "sequencer2d_s", "shvit": "shvit_s1", "sknet": "skresnet18",
    "starnet": "starnet_s1", "swiftformer": "swiftformer_xs", "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window8_256", "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224", "tnt": "tnt_s_patch16_224", "tresnet": "tresnet_m", "twins": "twins_pcpvt_small",
    "vgg": "vgg11_bn", "visformer": "visformer_tiny", "vision_transformer": "vit_tiny_patch16_224",
    "vision_transformer_hybrid": "vit_small_r26_s32_224", "vision_transformer_relpos": "vit_relpos_small_patch16_224",
    "vision_transformer_sam": "samvit_base_patch16", "vitamin": "vitamin_small_224", "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_dw", "xception": "legacy_xception", "xception_aligned": "xception41",
    "xcit": "xcit_nano_12_p16_224",
}  # fmt: skip

# Images of another size than usual: recurrences are followed step by step.
SIZES = {"sequencer2d_s": (64, 64)}

# Further networks of modules that hold several kinds.
MORE = (
    "tf_efficientnet_lite0", "tf_efficientnetv2_b0", "tf_mobilenetv3_small_100", "mobilenetv2_100", "mnasnet_small",
    "mixnet_s", "mobilenetv4_conv_small", "efficientnet_b0_gn", "fbnetc_100", "lcnet_050", "fbnetv3_b",
    "resnetv2_50x1_bit", "resnetv2_50d_gn", "dm_nfnet_f0", "nfnet_l0", "convnextv2_atto", "ecaresnet26t",
    "seresnet50", "resnext50_32x4d", "resnetrs50", "resnetblur50", "gcresnet33ts", "repvgg_a0", "halonet26t",
    "lambda_resnet26t", "lamhalobotnet50ts_256", "cspdarknet53", "cs3darknet_s", "selecsls60b", "regnetx_002",
    "maxvit_pico_rw_256", "caformer_s18", "convformer_s18", "gmlp_s16_224", "resmlp_12_224", "gmixer_12_224",
    "ghostnetv3_050", "deit3_small_patch16_224", "hrnet_w18", "vgg11", "mobilevitv2_050", "eca_nfnet_l0",
    "skresnext50_32x4d", "resnest50d_1s4x24d",
)  # fmt: skip


def load_torchvision() -> None:
    """Import torchvision.

    It registers shapes of its compiled operators when it is imported, which fails where its wheel was not built for
    this torch (PyPI's beside the CPU build: "operator torchvision::nms does not exist"). No network measured here needs
    them, so that an empty module then stands in the place of those registrations.

    Raises: ImportError: it is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        placeholder = "torchvision._meta_registrations"
        sys.modules[placeholder] = ModuleType(placeholder)
        importlib.import_module("torchvision")


def load() -> ModuleType:
    """Import timm.

    Raises: ImportError: timm or torchvision is not installed.
    """
    load_torchvision()
    return importlib.import_module("timm")


def networks() -> dict[str, str]:
    """Network -> the module of timm that it is of."""
    load()
    registry = importlib.import_module("timm.models._registry")
    found = {}
    for module, names in sorted(registry._module_to_models.items()):
        found[CHOSEN[module] if CHOSEN.get(module) in names else min(names)] = module
        found.update({name: module for name in MORE if name in names})
    return found


def candidates(name: str, building: Building) -> Iterator[Built]:
    """The network with its usual number of classes, and two images of its usual size."""
    torch.manual_seed(0)
    with building():
        model = load().create_model(name)
    channels, *sizes = model.default_cfg["input_size"]
    yield Built(model, (torch.randn(2, channels, *SIZES.get(name, sizes)),))
