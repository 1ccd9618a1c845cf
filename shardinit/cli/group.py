"""Groups of commands, whose own options may also stand behind the command."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class Commands(TyperGroup):
    """``client health --target HOST`` means ``client --target HOST health``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words of the command line, those options in front."""
        return super().parse_args(ctx, self._in_order(ctx, args))

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The commands with what each does in full, where click would cut it off."""
        found = [
            (name, self.get_command(ctx, name)) for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, one.get_short_help_str(limit=500))
                    for name, one in found
                    if one
                ]
            )

    def _in_order(self, ctx: Any, args: list[str]) -> list[str]:
        ours = _options(self, ctx)
        ahead: list[str] = []
        behind: list[str] = []
        words = iter(args)
        for word in words:
            name, equals, _ = word.partition("=")
            if word == "--":
                behind += [word, *words]
            elif name in ours and word.startswith("-"):
                takes = not equals and not getattr(ours[name], "is_flag", False)
                ahead += [word, *([next(words, "")] if takes else [])]
            else:
                if not behind:
                    found = self.get_command(ctx, word)
                    theirs = ours if found is None else _options(found, ctx)
                    ours = {k: v for k, v in ours.items() if k not in theirs}
                behind.append(word)
        return ahead + behind


def _options(command: Any, ctx: Any) -> dict[str, Any]:
    """The options of a command by each of their names."""
    return {
        name: option
        for option in command.get_params(ctx)
        for name in (*option.opts, *option.secondary_opts)
        if name.startswith("-")
    }
