"""English number words to digits: a masked loss with the targets as inputs, greedy decoding without them."""
