"""Keys and values that are already computed: prefixes, saved states, and a pool of sessions that remember prompts."""
