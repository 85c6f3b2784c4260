"""The objectives by name: an explicit table, one line for each."""

from __future__ import annotations

import difflib
import importlib

from .barlow_twins import BarlowTwins
from .base import Objective
from .beit import BEiT
from .byol import BYOL
from .cmae import CMAE
from .colorization import Colorization
from .cutpaste import CutPaste
from .data2vec import Data2Vec
from .dino import DINO
from .dinov2 import DINOv2
from .distil import Distil
from .gram import Gram
from .ibot import IBOT
from .ijepa import IJEPA
from .jigsaw import Jigsaw
from .lejepa import LeJEPA
from .mae import MAE
from .maskfeat import MaskFeat
from .moco_v1 import MoCoV1
from .moco_v2 import MoCoV2
from .moco_v3 import MoCoV3
from .msn import MSN
from .multimae import MultiMAE
from .rotation import Rotation
from .simclr import SimCLR
from .simmim import SimMIM
from .simsiam import SimSiam
from .sit import SiT
from .supcon import SupCon
from .swav import SwAV
from .vicreg import VICReg

OBJECTIVES: dict[str, type[Objective]] = {
    "mae": MAE,
    "simmim": SimMIM,
    "moco_v3": MoCoV3,
    "dino": DINO,
    "ibot": IBOT,
    "dinov2": DINOv2,
    "gram": Gram,
    "distil": Distil,
    "msn": MSN,
    "lejepa": LeJEPA,
    "beit": BEiT,
    "maskfeat": MaskFeat,
    "data2vec": Data2Vec,
    "ijepa": IJEPA,
    "cmae": CMAE,
    "sit": SiT,
    "multimae": MultiMAE,
    "rotation": Rotation,
    "jigsaw": Jigsaw,
    "colorization": Colorization,
    "cutpaste": CutPaste,
    "simclr": SimCLR,
    "supcon": SupCon,
    "moco_v1": MoCoV1,
    "moco_v2": MoCoV2,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "swav": SwAV,
}


def objective_class(name: str) -> type[Objective]:
    """The class behind a name of `OBJECTIVES`, or behind `my_package.my_module:MyObjective`.

    Raises:
        ValueError: there is no such name, module or class, or it is no `Objective`.
    """
    if ":" in name:
        return _import_objective(name)
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"no objective named {name!r}; {hint}there are: {', '.join(OBJECTIVES)}. "
            "An objective of your own is named like my_package.my_module:MyObjective"
        )
    return OBJECTIVES[name]


def _import_objective(name: str) -> type[Objective]:
    module_name, _, class_name = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"objective {name!r} cannot be imported: {error}; is it on the Python path?") from error
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ValueError(f"objective {name!r} is no subclass of hybrid_ssl.objectives.base.Objective")
    return found
