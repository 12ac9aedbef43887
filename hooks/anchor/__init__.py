"""Anchor: weight decay toward w_pre."""
