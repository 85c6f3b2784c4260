"""What the systems call things in their checkpoint files: one table each. Names are from the official repositories.

Keys are dotted paths through the file without wrappers (`files`), e.g. `teacher.backbone.blocks.0.norm1.weight`. What
stands before the stem's name is the way to an encoder; a word in it names that encoder. After `renames` the names are
timm's: those of its `VisionTransformer` with fused `attn.qkv` and `ls1.gamma`, or of its Swin.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

STEMS = re.compile(
    r"(?P<way>.*?)(patch_embed\.proj(ection)?(\.0)?\.weight|input_adapters\.rgb\.proj\.weight"
    r"|embeddings\.patch_embeddings\.weight)"
)
"""the first layer of an encoder; whatever stands before it is the way there"""

BUFFERS = r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|num_batches_tracked)"
"""recomputed by timm"""

Names = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class System:
    """One system's layout.

    Attributes:
        name: as its paper.
        sign: patterns; a file in which each is found in some key is of this system.
        parts: words for its encoders, the one that the authors publish results with first.
        renames: (pattern, replacement), in order, for names behind the way to the encoder.
        ignored: pattern of what is left out on purpose.
        swin_eps: of the norms of its Swin, if not timm's, which timm cannot change.
        mean, std: per channel in 0..1, what images were normalised with; ImageNet's for all but BEiT.
    """

    name: str
    sign: tuple[str, ...]
    parts: tuple[str, ...] = ()
    renames: Names = ()
    ignored: str = r"head\..*|mask_token"
    swin_eps: float | None = None
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def recognises(self, keys: str) -> bool:
        """Whether a file with these keys, one a line, is of this system."""
        return all(re.search(pattern, keys, re.MULTILINE) for pattern in self.sign)


_CHUNKS: Names = ((r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),)  # FSDP training of DINOv2 and v3: blocks.CHUNK.BLOCK
_SPLIT: Names = ((r"\.w1\.", ".fc1_g."), (r"\.w2\.", ".fc1_x."), (r"\.w3\.", ".fc2."))  # silu(w1 x) * w2 x

SYSTEMS = (
    System(  # github.com/EPFL-VILAB/MultiMAE; no norm behind its encoder; the image's adapter is the stem
        "MultiMAE",
        (r"input_adapters\.rgb\.proj\.weight$",),
        renames=(
            (r"^global_tokens$", "cls_token"),
            (r"^input_adapters\.rgb\.proj\.", "patch_embed.proj."),
            (r"^input_adapters\.rgb\.pos_emb$", "pos_embed"),
            (r"^encoder\.", "blocks."),
        ),
        ignored=r"(input|output)_adapters\..*",
    ),
    System(  # github.com/ZhichengHuang/CMAE: OpenMMLab's ViT
        "CMAE",
        (r"patch_embed\.projection\.weight$",),
        parts=("backbone", "target_backbone"),
        renames=(
            (r"^patch_embed\.projection\.", "patch_embed.proj."),
            (r"^ln1\.", "norm."),
            (r"^layers\.", "blocks."),
            (r"\.ln([12])\.", r".norm\1."),
            (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
            (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
        ),
    ),
    System(  # as transformers saves it
        "DINOv3 of transformers",
        (r"embeddings\.patch_embeddings\.weight$", r"attention\.o_proj\.weight$"),
        renames=(
            (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
            (r"^embeddings\.register_tokens$", "reg_token"),
            (r"^embeddings\.", ""),
            (r"^(model\.)?layer\.", "blocks."),
            (r"\.attention\.o_proj\.", ".attn.proj."),
            (r"\.attention\.", ".attn."),
            (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
            (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
            (r"\.mlp\.up_proj\.", ".mlp.fc1."),  # fc1_x beside a gate
            (r"\.mlp\.down_proj\.", ".mlp.fc2."),
        ),
    ),
    System(  # github.com/facebookresearch/dinov3
        "DINOv3",
        (r"storage_tokens$|rope_embed\.periods$",),
        parts=("teacher", "student"),
        renames=(*_CHUNKS, (r"^storage_tokens$", "reg_token"), (r"^rope_embed\.periods$", "rope.periods"), *_SPLIT),
        ignored=r"head\..*|mask_token|local_cls_norm\..*",  # that norm is for local crops in training
    ),
    System(  # github.com/facebookresearch/ijepa; no class token
        "I-JEPA",
        (r"^target_encoder\.", r"^predictor\.predictor_pos_embed$"),
        parts=("target_encoder", "encoder"),
    ),
    System(  # github.com/facebookresearch/msn; `fc` is its projection head
        "MSN",
        (r"^target_encoder\.",),
        parts=("target_encoder", "encoder"),
        ignored=r"(fc|pred)\..*",
    ),
    System(  # github.com/facebookresearch/moco-v3
        "MoCo v3",
        (r"(^|\.)(base|momentum)_encoder\.",),
        parts=("base_encoder", "momentum_encoder"),
    ),
    System(  # github.com/facebookresearch/mae, with its decoder
        "MAE",
        (r"(^|\.)decoder_blocks\.0\.",),
        ignored=r"mask_token|decoder_.*|head\..*",
    ),
    System(  # github.com/microsoft/SimMIM: Swin, and a ViT in BEiT's names
        "SimMIM",
        (r"(^|\.)encoder\.patch_embed\.", r"(^|\.)decoder\.0\.weight$"),
        parts=("encoder",),
    ),
    System(  # github.com/bytedance/ibot: ViT and Swin
        "iBOT",
        (r"(^|\.)masked_embed$",),
        parts=("teacher", "student"),
        ignored=r"head\..*|masked_embed",
        swin_eps=1e-6,
    ),
    System(  # github.com/microsoft/unilm/tree/master/beit, beit2
        "BEiT",
        (r"(^|\.)blocks\.0\.attn\.q_bias$|(^|\.)rel_pos_bias\.",),
        ignored=r"head\..*|mask_token|lm_head\..*|cls_pt_(layers|norm)\..*",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
    System(  # github.com/facebookresearch/dinov2
        "DINOv2",
        (r"register_tokens$|mask_token$|dino_head\.", r"\.ls1\.gamma$"),
        parts=("teacher", "student"),
        renames=(*_CHUNKS, (r"^register_tokens$", "reg_token"), (r"\.w12\.", ".fc1."), (r"\.w3\.", ".fc2.")),
    ),
    System(  # github.com/facebookresearch/dino, full checkpoint; its encoder alone is as the last
        "DINO",
        (r"^(teacher|student)\.backbone\.",),
        parts=("teacher", "student"),
    ),
    System("Swin, official names", (r"(^|\.)layers\.0\.blocks\.0\.norm1\.weight$",)),
    System("ViT, timm's names", (r"(^|\.)blocks\.0\.norm1\.weight$",), ignored=r"(head|head_dist|fc)\..*|mask_token"),
)
"""the first that recognises a file counts"""
