"""The administrator's HTTP surface, of which tenants use what concerns their own things."""
