"""What candles, books, entries, series and time are: frozen values and pure functions, no I/O."""
