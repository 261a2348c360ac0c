# fish completion for virtlockctl; /usr/share/fish/vendor_completions.d/virtlockctl.fish
function __virtlockctl_guests
    # The guests, as the daemon knows them; their names are in the table's first column.
    virtlockctl status 2>/dev/null |
        awk '/^$/ { tables++; next } tables == 1 && $1 != "DOMAIN" { print $1 }'
end

complete -c virtlockctl -f
complete -c virtlockctl -l session -d 'The daemon of this user'
complete -c virtlockctl -l socket -r -F -d 'The daemon whose admin socket this is'
complete -c virtlockctl -l json -d 'JSON instead of tables'
complete -c virtlockctl -l help -d 'The help'
complete -c virtlockctl -n __fish_use_subcommand -l version -d 'The version'
complete -c virtlockctl -n __fish_use_subcommand -a status -d 'What is held, or what one guest holds'
complete -c virtlockctl -n __fish_use_subcommand -a who -d 'Who has a disk'
complete -c virtlockctl -n __fish_use_subcommand -a events -d 'What happens, as it happens'
complete -c virtlockctl -n __fish_use_subcommand -a metrics -d 'Numbers, as OpenMetrics text'
complete -c virtlockctl -n __fish_use_subcommand -a audit -d 'Guests with disks that no lock protects'
complete -c virtlockctl -n __fish_use_subcommand -a doctor -d 'Is locking set up as it must be?'
complete -c virtlockctl -n __fish_use_subcommand -a exec -d 'Runs a command that has locks'
complete -c virtlockctl -n '__fish_seen_subcommand_from status' -a '(__virtlockctl_guests)'
complete -c virtlockctl -n '__fish_seen_subcommand_from who exec' -F
complete -c virtlockctl -n '__fish_seen_subcommand_from events' -l only -x -d 'These kinds alone' \
    -a '(__fish_append , registered granted released refused fenced killed died upgraded recovered)'
complete -c virtlockctl -n '__fish_seen_subcommand_from exec' -l shared -d 'Others may have the locks, too'
complete -c virtlockctl -n '__fish_seen_subcommand_from exec' -l wait -x -d 'For so long, seconds'
complete -c virtlockctl -n '__fish_seen_subcommand_from exec' -l lease -r -F -d 'libvirt\'s leases in this lockspace'
