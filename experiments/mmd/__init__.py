"""A loss on a middle layer of two domains and a classification loss, with the labels as an input."""
