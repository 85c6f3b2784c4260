"""hybrid_ssl: masked-image and contrastive self-supervised pretraining of timm encoders, combined by configuration."""

__version__ = "0.1.0"
