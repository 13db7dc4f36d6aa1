"""The commands `edgelm pretrain`, `edgelm finetune` and `edgelm distill`."""
