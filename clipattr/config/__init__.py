"""Settings: one schema, one loader. The only package that imports OmegaConf."""
