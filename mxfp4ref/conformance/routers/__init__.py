"""What is wrong with a router: hypotheses on its ids and weights, and what is solved from them."""
