package vm

import (
	"os"
	"path/filepath"

	"dolium/internal/fault"
	"dolium/internal/sparse"

	"github.com/containerd/errdefs"
)

// UEFI is the firmware OVMF: its code, the same for all machines, and variables, of which each machine has its own copy.
// Distributions have it at different places.
var firmwares = map[string][][2]string{
	firmwareUEFI: {
		{"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"},
		{"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/OVMF/OVMF_VARS.fd"},
		{"/usr/share/edk2/ovmf/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_VARS.fd"},
		{"/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/edk2/x64/OVMF_VARS.4m.fd"},
	},
	// Variables with the keys of Microsoft and of distributions enrolled.
	firmwareSecure: {
		{"/usr/share/OVMF/OVMF_CODE_4M.ms.fd", "/usr/share/OVMF/OVMF_VARS_4M.ms.fd"},
		{"/usr/share/OVMF/OVMF_CODE.ms.fd", "/usr/share/OVMF/OVMF_VARS.ms.fd"},
		{"/usr/share/edk2/ovmf/OVMF_CODE.secboot.fd", "/usr/share/edk2/ovmf/OVMF_VARS.secboot.fd"},
	},
}

// firmwareFiles finds a firmware's code and its first variables; both are empty for a BIOS, which QEMU brings. Error:
// ErrFailedPrecondition when it isn't installed.
func firmwareFiles(kind string) (code, vars string, err error) {
	if kind == firmwareBIOS {
		return "", "", nil
	}
	for _, f := range firmwares[kind] {
		_, cerr := os.Stat(f[0])
		_, verr := os.Stat(f[1])
		if cerr == nil && verr == nil {
			return f[0], f[1], nil
		}
	}
	return "", "", fault.New(errdefs.ErrFailedPrecondition,
		"firmware %q needs OVMF, which isn't installed: install the package ovmf (Debian, Ubuntu) or edk2-ovmf (Fedora, RHEL)", kind)
}

// varsName is a machine's own variables, in the directory of the container's layer.
const varsName = "firmware-vars.fd"

// ownVars makes a machine's variables the first time.
func ownVars(dir, first string) (string, error) {
	path := filepath.Join(dir, varsName)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := sparse.Copy(first, path+".new"); err != nil {
		return "", err
	}
	return path, os.Rename(path+".new", path)
}
