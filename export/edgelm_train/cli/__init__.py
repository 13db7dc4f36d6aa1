"""The commands `edgelm pretrain`, `finetune` and `distill`: a module each, because edgelm loads them one by one."""
