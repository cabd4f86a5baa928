"""The C++ runtime headers that every generated CPU kernel includes, and C++ kernel templates."""
