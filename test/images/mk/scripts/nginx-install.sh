install nginx-light || { apt-get update -qq && install nginx-light; }
# Logs go where a container's logs are.
ln -sf /dev/stdout /var/log/nginx/access.log
ln -sf /dev/stderr /var/log/nginx/error.log
mkdir -p /usr/share/nginx/html
cat >/etc/nginx/sites-available/default <<'CONF'
server {
	listen 80 default_server;
	listen [::]:80 default_server;
	server_name _;
	root /usr/share/nginx/html;
	index index.html index.htm;
}
CONF
