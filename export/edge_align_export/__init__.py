"""The publisher's side: what is made once per base model (latent packs)."""
