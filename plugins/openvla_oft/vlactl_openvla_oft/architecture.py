"""Sizes of OpenVLA-OFT as plain numbers, and those that ship: `full`, `small` and `tiny`.

Imports no torch: the plan computes footprints from these. Field names follow the libraries that
consume them (timm's VisionTransformer, Hugging Face's text_config).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlactl.api.contracts import ValueLevel

ACTION_DIM = 7
CHUNK_LENGTH = 8
NUM_ACTION_TOKENS = ACTION_DIM * CHUNK_LENGTH
NUM_BINS = 256
BOS_ID = 1
STOP_ID = 2
CHANNELS_PER_IMAGE = 6
"""Every picture enters twice, normalised for each tower."""
STATE_DIM = 8
"""Position and axis-angle of the end effector, and two finger joints."""
VALUE_HIDDEN = (512, 128)
VALUE_OUTPUTS: dict[ValueLevel, int] = {"none": 0, "chunk": 1, "action": CHUNK_LENGTH}


@dataclass(frozen=True, slots=True, kw_only=True)
class TowerConfig:
    """One vision transformer, in timm's terms."""

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    class_token: bool
    reg_tokens: int
    no_embed_class: bool
    init_values: float | None
    """Not None: the blocks have LayerScale."""
    global_pool: str
    """ "map" adds an attention pool, which is stored and never used."""
    stem: tuple[int, ...] = ()
    """Channels of convolutions of stride 2 that make patches, where one linear map does not: they
    learn from few pictures (Xiao et al. 2021, arXiv:2106.14881)."""

    @property
    def num_patches(self) -> int:
        """Tokens that one picture becomes."""
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_prefix_tokens(self) -> int:
        """Class and register tokens ahead of the patches."""
        return int(self.class_token) + self.reg_tokens

    @property
    def mlp_dim(self) -> int:
        """Width of the blocks' hidden layer."""
        return int(self.embed_dim * self.mlp_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    """The two towers whose features are concatenated, patch by patch."""

    featurizer: TowerConfig
    fused_featurizer: TowerConfig

    @property
    def towers(self) -> tuple[TowerConfig, TowerConfig]:
        """Both, in the order of the picture's channels."""
        return self.featurizer, self.fused_featurizer

    @property
    def embed_dim(self) -> int:
        """Width of a patch feature."""
        return self.featurizer.embed_dim + self.fused_featurizer.embed_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig:
    """The Llama; the defaults are those of a text_config that names none of them."""

    vocab_size: int = 32064
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    pad_token_id: int = 32000


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """Everything that fixes the shapes of the parameters."""

    vision: VisionConfig
    language: LanguageConfig = field(default_factory=LanguageConfig)
    vocab_padding: int = 64
    """Rows at the end of the vocabulary that stand for no token."""
    value_outputs: int = 0
    """Outputs of the value head: 0 = none, 1 = per chunk, else one per action."""
    state_dim: int = 0
    """Numbers of the proprioceptive state, which enters as one token; 0 = it does not."""

    @property
    def action_end(self) -> int:
        """One past the last action token."""
        return self.language.vocab_size - self.vocab_padding

    @property
    def action_start(self) -> int:
        """The first of the 256 action tokens."""
        return self.action_end - NUM_BINS


PUBLISHED_TOWERS = ("vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224")
"""timm's names of the towers in every published checkpoint."""

FULL = Architecture(
    vision=VisionConfig(
        featurizer=TowerConfig(
            img_size=224,
            patch_size=14,
            embed_dim=1024,
            depth=24,
            num_heads=16,
            mlp_ratio=4.0,
            class_token=True,
            reg_tokens=4,
            no_embed_class=True,
            init_values=1e-5,
            global_pool="token",
        ),
        fused_featurizer=TowerConfig(
            img_size=224,
            patch_size=14,
            embed_dim=1152,
            depth=27,
            num_heads=16,
            mlp_ratio=3.7362,
            class_token=False,
            reg_tokens=0,
            no_embed_class=False,
            init_values=None,
            global_pool="map",
        ),
    )
)

TINY = Architecture(
    vision=VisionConfig(
        featurizer=TowerConfig(
            img_size=112,
            patch_size=14,
            embed_dim=96,
            depth=3,
            num_heads=3,
            mlp_ratio=4.0,
            class_token=True,
            reg_tokens=4,
            no_embed_class=True,
            init_values=1.0,
            global_pool="token",
        ),
        fused_featurizer=TowerConfig(
            img_size=112,
            patch_size=14,
            embed_dim=96,
            depth=3,
            num_heads=3,
            mlp_ratio=4.0,
            class_token=False,
            reg_tokens=0,
            no_embed_class=False,
            init_values=None,
            global_pool="map",
        ),
    ),
    language=LanguageConfig(
        vocab_size=448,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=384,
    ),
)
"""Text ids 0-127, action ids 128-383, padding from 384: the published order at a small scale."""

SMALL_TOWER = TowerConfig(
    img_size=128,
    patch_size=16,
    embed_dim=192,
    depth=4,
    num_heads=3,
    mlp_ratio=4.0,
    class_token=False,
    reg_tokens=0,
    no_embed_class=False,
    init_values=None,
    global_pool="avg",
    stem=(32, 64, 128),
)
SMALL = Architecture(
    vision=VisionConfig(featurizer=SMALL_TOWER, fused_featurizer=SMALL_TOWER),
    language=LanguageConfig(
        vocab_size=448,
        hidden_size=320,
        intermediate_size=864,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=5,
        pad_token_id=384,
    ),
    state_dim=STATE_DIM,
)
"""13 million parameters that one GPU trains from nothing. Ids are those of `tiny`."""

BUILT_IN = {"small": SMALL, "tiny": TINY}
"""Sizes that need no checkpoint."""
