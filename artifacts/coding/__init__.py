"""How numbers become bytes: packing, mixed radix, frequency coding, rounding, and checks of what is coded."""
