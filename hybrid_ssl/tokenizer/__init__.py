"""Discrete image tokenizers: trained here, frozen, and read by the objectives that predict their ids (BEiT)."""
