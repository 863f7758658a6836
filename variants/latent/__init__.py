"""Multi-head latent attention (MLA): keys and values of all heads read out of one small latent per token."""
