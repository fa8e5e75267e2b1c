"""How the recipes were chosen, and how fast they are."""
