package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/docker/cli/cli/command"
	"github.com/docker/compose/v5/pkg/api"
	"github.com/docker/compose/v5/pkg/compose"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// Compose makes a container anew when anything of its service has changed. Dolium can change published ports in place, so a
// service of which nothing else has changed keeps its containers, and the connections to them: before "up", their ports are
// changed and they get the label by which Compose sees that they are as the file says. For that the ports of a service are
// noted in a label when its containers are created.
const portsLabel = "dolium.compose.ports"

// labellingCLI is a CLI whose API client adds portsLabel to what Compose creates.
type labellingCLI struct {
	command.Cli
	ports map[string]string // the label by service
}

// Client implements command.Cli.
func (c *labellingCLI) Client() client.APIClient { return labellingClient{c.Cli.Client(), c} }

type labellingClient struct {
	client.APIClient
	cli *labellingCLI
}

// ContainerCreate implements client.APIClient.
func (c labellingClient) ContainerCreate(ctx context.Context, o client.ContainerCreateOptions) (client.ContainerCreateResult, error) {
	if o.Config != nil {
		if ports, ok := c.cli.ports[o.Config.Labels[api.ServiceLabel]]; ok {
			o.Config.Labels[portsLabel] = ports
		}
	}
	return c.APIClient.ContainerCreate(ctx, o)
}

// adaptPorts notes the ports of the project's services and, before "up", changes those of containers in place. What it
// can't do is left to Compose, mistakes in files among it.
//
// root is the command that has the flags of all.
func (c *labellingCLI) adaptPorts(root, cmd *cobra.Command) {
	if cmd.Name() != "up" && cmd.Name() != "create" {
		return
	}
	project, err := c.load(cmd.Context(), root.Flags())
	if err != nil {
		return // Compose says what is wrong
	}
	c.ports = map[string]string{}
	for name, s := range project.Services {
		if raw, err := json.Marshal(s.Ports); err == nil {
			c.ports[name] = string(raw)
		}
	}
	for _, flag := range []string{"force-recreate", "no-recreate", "always-recreate-deps"} {
		if on, err := cmd.Flags().GetBool(flag); err == nil && on {
			return
		}
	}
	if cmd.Name() != "up" {
		return
	}
	found, err := c.Cli.Client().ContainerList(cmd.Context(), client.ContainerListOptions{
		Filters: client.Filters{}.Add("label", api.ProjectLabel+"="+project.Name).Add("label", portsLabel),
	})
	if err != nil {
		return
	}
	for _, ctr := range found.Items {
		service, ok := project.Services[ctr.Labels[api.ServiceLabel]]
		if !ok || ctr.Labels[portsLabel] == c.ports[service.Name] {
			continue
		}
		if changed, err := c.changePorts(cmd.Context(), ctr.ID, ctr.Labels, service); err != nil {
			logrus.Debugf("ports of %s: %v", ctr.ID, err) // Compose makes it anew, and meets the same error
		} else if changed {
			fmt.Fprintf(c.Err(), " Container %s Ports changed in place\n", nameOf(ctr.Names))
		}
	}
}

func nameOf(names []string) string {
	if len(names) == 0 {
		return ""
	}
	return names[0][1:]
}

// load reads the project as the command is about to, quietly.
func (c *labellingCLI) load(ctx context.Context, flags *pflag.FlagSet) (*types.Project, error) {
	level := logrus.GetLevel()
	logrus.SetLevel(logrus.ErrorLevel)
	defer logrus.SetLevel(level)
	service, err := compose.NewComposeService(c.Cli)
	if err != nil {
		return nil, err
	}
	var o api.ProjectLoadOptions
	for name, to := range map[string]*string{"project-name": &o.ProjectName, "project-directory": &o.WorkingDir} {
		if *to, err = flags.GetString(name); err != nil {
			return nil, err
		}
	}
	if dir, err := flags.GetString("workdir"); err == nil && dir != "" && o.WorkingDir == "" {
		o.WorkingDir = dir // what --project-directory was called
	}
	for name, to := range map[string]*[]string{"file": &o.ConfigPaths, "env-file": &o.EnvFiles, "profile": &o.Profiles} {
		if *to, err = flags.GetStringArray(name); err != nil {
			return nil, err
		}
	}
	return service.LoadProject(ctx, o)
}

// changePorts changes the ports of a container if they are all that has changed of its service.
func (c *labellingCLI) changePorts(ctx context.Context, id string, labels map[string]string, service types.ServiceConfig) (bool, error) {
	was := service
	was.Ports = nil
	if err := json.Unmarshal([]byte(labels[portsLabel]), &was.Ports); err != nil {
		return false, err
	}
	old, err := compose.ServiceHash(was)
	if err != nil || old != labels[api.ConfigHashLabel] {
		return false, err
	}
	hash, err := compose.ServiceHash(service)
	if err != nil {
		return false, err
	}
	bindings, err := portBindings(service.Ports)
	if err != nil {
		return false, err
	}
	return true, c.post(ctx, "/containers/"+id+"/ports", map[string]any{
		"PortBindings": bindings,
		"Labels":       map[string]string{api.ConfigHashLabel: hash, portsLabel: c.ports[service.Name]},
	})
}

// portBindings are a service's ports in the API's form.
func portBindings(ports []types.ServicePortConfig) (network.PortMap, error) {
	out := network.PortMap{}
	for _, p := range ports {
		port, err := network.ParsePort(fmt.Sprintf("%d/%s", p.Target, p.Protocol))
		if err != nil {
			return nil, err
		}
		var host netip.Addr
		if p.HostIP != "" {
			if host, err = netip.ParseAddr(p.HostIP); err != nil {
				return nil, err
			}
		}
		out[port] = append(out[port], network.PortBinding{HostIP: host, HostPort: p.Published})
	}
	return out, nil
}

// post sends a request that Docker's API doesn't have.
func (c *labellingCLI) post(ctx context.Context, path string, body any) error {
	raw, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://d"+path, bytes.NewReader(raw))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	dial := c.Cli.Client().Dialer()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }, DisableKeepAlives: true}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096)) // the status says enough
		return fmt.Errorf("%s: %s", resp.Status, bytes.TrimSpace(text))
	}
	return nil
}
