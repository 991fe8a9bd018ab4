"""Lightning modules, datamodules and the trainer: thin glue around the science packages."""
