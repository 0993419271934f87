"""The daemon as a whole: makes its parts, connects, starts and stops them. No part imports this."""
