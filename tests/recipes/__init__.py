"""Tests of edgelm_recipes."""
