"""What tests share: clocks, fakes that keep their interface's contract, and builders of values."""
