"""Recipes: YAML files decoded into frozen, typed dataclasses, with every mistake named. Needs no torch."""
