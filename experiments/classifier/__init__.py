"""The classifier of the post: accuracy and a middle layer's norm on the bar."""
