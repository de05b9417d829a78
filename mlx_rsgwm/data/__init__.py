"""Questions with gold answers, and the training rows made from them."""
