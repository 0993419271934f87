drop function chatgenius.acknowledged(text [], text []);
drop function chatgenius.presence_changed(text [], text []);
