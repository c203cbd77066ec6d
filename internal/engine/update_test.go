package engine

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
)

func TestUpdateRefusesWhatDockerRefuses(t *testing.T) {
	for _, tt := range []struct {
		is   container.HostConfig
		set  container.UpdateConfig
		want string
	}{
		{set: container.UpdateConfig{Resources: container.Resources{Memory: 1 << 20}}, want: "Minimum memory limit allowed is 6MB"},
		{set: container.UpdateConfig{Resources: container.Resources{Memory: 100 << 20, MemorySwap: 50 << 20}}, want: "Minimum memoryswap limit should be larger than memory limit"},
		{set: container.UpdateConfig{Resources: container.Resources{Memory: 100 << 20, MemoryReservation: 200 << 20}}, want: "Minimum memory limit can not be less than memory reservation limit"},
		{set: container.UpdateConfig{Resources: container.Resources{NanoCPUs: 1e9, CPUPeriod: 10000}}, want: "Conflicting options: Nano CPUs and CPU Period cannot both be set"},
		{set: container.UpdateConfig{Resources: container.Resources{NanoCPUs: 1e9, CPUQuota: 10000}}, want: "Conflicting options: Nano CPUs and CPU Quota cannot both be set"},
		{set: container.UpdateConfig{Resources: container.Resources{NanoCPUs: 1e18}}, want: "range of CPUs is from 0.01 to"},
		{set: container.UpdateConfig{Resources: container.Resources{CPUPeriod: 10}}, want: "CPU cfs period can not be less than 1ms"},
		{set: container.UpdateConfig{Resources: container.Resources{BlkioWeight: 5}}, want: "Range of blkio weight is from 10 to 1000"},
		{set: container.UpdateConfig{RestartPolicy: container.RestartPolicy{Name: "sometimes"}}, want: "invalid restart policy"},
		{is: container.HostConfig{Resources: container.Resources{CPUPeriod: 10000}}, set: container.UpdateConfig{Resources: container.Resources{NanoCPUs: 1e9}}, want: "Nano CPUs cannot be updated as CPU Period has already been set"},
		{is: container.HostConfig{Resources: container.Resources{NanoCPUs: 1e9}}, set: container.UpdateConfig{Resources: container.Resources{CPUQuota: 10000}}, want: "CPU Quota cannot be updated as NanoCPUs has already been set"},
		{is: container.HostConfig{Resources: container.Resources{Memory: 100 << 20, MemorySwap: 200 << 20}}, set: container.UpdateConfig{Resources: container.Resources{Memory: 300 << 20}}, want: "Memory limit should be smaller than already set memoryswap limit"},
		{is: container.HostConfig{AutoRemove: true}, set: container.UpdateConfig{RestartPolicy: container.RestartPolicy{Name: "always"}}, want: "Restart policy cannot be updated because AutoRemove is enabled"},
	} {
		e := newTestEngine(t)
		c := e.addContainer(t, "web", func(r *record) { r.HostConfig = &tt.is })
		inst := &fakeInstance{}
		c.runFake(inst)
		_, err := e.ContainerUpdate(t.Context(), "web", tt.set)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("error %v, want %q", err, tt.want)
			continue
		}
		if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, errdefs.ErrConflict) {
			t.Errorf("%v has the wrong kind", err)
		}
		if len(inst.updated) > 0 {
			t.Errorf("%s: something was changed all the same", tt.want)
		}
	}
}

func TestUpdateIsAppliedAndStoredOrNeither(t *testing.T) {
	e := newTestEngine(t)
	c := e.addContainer(t, "web", func(r *record) { r.HostConfig.Resources.CPUShares = 512 })
	before, _ := c.snapshot()
	inst := &fakeInstance{}
	c.runFake(inst)
	pids := int64(50)
	update := container.UpdateConfig{Resources: container.Resources{Memory: 64 << 20, PidsLimit: &pids}, RestartPolicy: container.RestartPolicy{Name: "always"}}
	if _, err := e.ContainerUpdate(t.Context(), "web", update); err != nil {
		t.Fatal(err)
	}
	stored, err := e.records.Get(c.ID())
	if err != nil {
		t.Fatal(err)
	}
	r := stored.HostConfig.Resources
	if r.Memory != 64<<20 || *r.PidsLimit != 50 || r.CPUShares != 512 || stored.HostConfig.RestartPolicy.Name != "always" {
		t.Errorf("stored %+v", stored.HostConfig)
	}
	if len(inst.updated) != 1 || inst.updated[0].Memory != 64<<20 || inst.updated[0].CPUShares != 512 {
		t.Errorf("applied %+v", inst.updated)
	}
	if before.HostConfig.Resources.Memory != 0 {
		t.Error("an earlier snapshot has changed")
	}

	inst.updateErr = errors.New("the kernel says no")
	_, err = e.ContainerUpdate(t.Context(), "web", container.UpdateConfig{Resources: container.Resources{Memory: 32 << 20}})
	if err == nil || !strings.Contains(err.Error(), "Cannot update container "+c.ID()+": the kernel says no") {
		t.Errorf("error: %v", err)
	}
	if now, _ := c.snapshot(); now.HostConfig.Resources.Memory != 64<<20 {
		t.Errorf("memory is %d after an update that failed", now.HostConfig.Resources.Memory)
	}
}
