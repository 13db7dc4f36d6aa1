"""The Hugging Face hub: the only room that asks the network, and only for `edgelm pull` and `edgelm push`."""
