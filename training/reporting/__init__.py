"""Result rows, and what is rendered, checked and published from them."""
